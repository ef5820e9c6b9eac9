"""The methods that unlearning is compared with, METHOD.md sections 7 and 10: and the towers of features."""
