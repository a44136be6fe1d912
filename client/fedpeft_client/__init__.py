"""The client: an agent beside the data; network, retries and local state around the library."""
