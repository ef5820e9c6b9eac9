"""Weight files and the names in them."""
