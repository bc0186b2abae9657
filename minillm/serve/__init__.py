"""From a trained model to people: the OpenAI-compatible server and the terminal chat."""
