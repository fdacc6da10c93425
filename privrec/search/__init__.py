"""Private on-device search: each device's own hash functions over the compressed item memory."""
