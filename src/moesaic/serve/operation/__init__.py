"""Running the server: settings, keys, limits, metrics, logs, several models, and a graceful end."""
