"""The packed model: layers as they are stored, loaded and computed with. FORMAT.md says what every byte means."""
