"""The commands of operators and researchers."""
