"""The secure sum: the ring, keys, masks, shares and neighbours, and both sides of the protocol."""
