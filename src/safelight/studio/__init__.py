"""The page: make pictures, change them, find them again, compare, look inside, train.

Gradio gives the forms, tabs, the mask's editor and the plots. What shows the server's own state,
the live view and the gallery (`studio.js`), asks the server's own API, so that it is right again
after a restart and no picture is copied.
"""
