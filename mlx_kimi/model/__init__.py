"""The mathematics: layers, states, and a step through all of them."""
