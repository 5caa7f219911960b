"""One file per model family: where its decoder layers and vision spans are. Every method comes for free."""
