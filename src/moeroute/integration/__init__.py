"""The only folder that knows transformers and PEFT; it imports nothing by itself."""
