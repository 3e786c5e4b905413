"""Running a model to write text: what chat, evaluation and the server stand on."""
