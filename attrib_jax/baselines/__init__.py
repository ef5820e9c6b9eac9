"""The methods that unlearning is compared with, METHOD.md sections 7 and 10: pure functions, one file a step."""
