"""How the models that ship were made, and how to make them again."""
