"""How the embedded model was made: scenes, recipe, evaluation. Nothing here is needed to serve."""
