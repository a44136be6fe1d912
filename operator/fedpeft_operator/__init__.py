"""Tools of operators and researchers: command line, demo, console, doctor and top."""
