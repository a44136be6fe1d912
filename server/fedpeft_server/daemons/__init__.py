"""Several daemons on one database: what each tells the others, and what it takes up of theirs."""
