"""From a recipe to a trained model. Imports `recipe` and all rooms but `commands`."""
