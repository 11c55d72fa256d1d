"""The server's metrics, traces and log."""
