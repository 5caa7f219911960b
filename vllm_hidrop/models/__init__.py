"""One file per model family: where its decoder layers and vision tower are. Every method runs in every family."""
