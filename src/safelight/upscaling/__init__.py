"""Enlarge pictures with networks that were trained for it, such as Real-ESRGAN and SwinIR.

The networks are those of the library spandrel, the files are read by our own checks:
`names` (without PyTorch), `network` (a file becomes a network), `tiles` (a picture in parts),
`upscaler` (pictures in and out), `loaded` (those that a process keeps), `record` (what a picture's
file says about it).
"""
