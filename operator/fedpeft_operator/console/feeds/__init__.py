"""State of the federation as the pages show it, kept up to date while anybody looks."""
