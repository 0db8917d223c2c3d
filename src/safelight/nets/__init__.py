"""The networks, one file each: text encoder, UNets, autoencoder, and the layers they share.

Attribute names equal the keys of a diffusers folder, so weights load without renaming.
"""
