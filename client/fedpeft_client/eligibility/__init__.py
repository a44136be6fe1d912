"""Pure rules: may this site work for a run, and does its policy allow it."""
