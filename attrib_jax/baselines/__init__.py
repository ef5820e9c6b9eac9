"""Attribution by similarity, to compare unlearning with, and the towers whose features it takes."""
