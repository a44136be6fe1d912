"""Parts of every process: settings, logs, traces, files and locks."""
