"""SQL, one module a subject; each function is a part of the caller's transaction."""
