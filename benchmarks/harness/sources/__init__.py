"""Read files inside packages, local folders and the hub."""
