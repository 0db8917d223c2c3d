"""The page in the browser: draw pictures, edit, search, compare, look inside, train.

Gradio provides forms, tabs and the mask editor. The live view and the gallery are our own
(`studio.js`). They use the server's public API, so that they are correct again after a restart and
copy no picture.
"""
