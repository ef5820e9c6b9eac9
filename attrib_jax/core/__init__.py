"""Types, random keys, weight selection and checks that everything else builds on."""
