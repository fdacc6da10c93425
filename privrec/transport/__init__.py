"""How a round reaches the devices, and their sum the server."""
