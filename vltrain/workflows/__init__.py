"""One module per thing a user wants done; the only place where data meets models."""
