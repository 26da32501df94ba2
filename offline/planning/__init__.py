"""One compression run: its resolved settings, its resumable state, the resources it needs."""
