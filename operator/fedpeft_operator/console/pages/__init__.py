"""The pages of the console, one a module: each draws its fragments, and serves them whole or as they change."""
