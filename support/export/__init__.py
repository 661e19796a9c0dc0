"""The model card of an exported folder, and the records it is made from."""
