"""A user's own scans: preparing them, registering two of them, and the pages to look at."""
