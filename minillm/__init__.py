"""Small language models, from raw text to a chat server.

`import minillm` is instant and pulls in nothing heavy. `import minillm.models` registers the
model classes with transformers' Auto classes.
"""

__version__ = "0.1.0"
