"""Everything that sees a history; what can leave a device is read here.

It imports nothing of the server, the transport or the network.
"""
