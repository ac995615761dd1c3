"""Where bytes come from: files inside packages, local folders, the hub."""
