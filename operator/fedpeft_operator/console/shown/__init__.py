"""Contents of the pages as plain values: no request, no network and no HTML, so all of it is tested as functions."""
