"""Files on disk: read with a message, written whole or not at all, hashed, told apart by name, shipped inside."""
