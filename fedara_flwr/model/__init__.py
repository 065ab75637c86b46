"""The model as numbers: which modules and parts it has, which slots live, what is drawn, what changed."""
