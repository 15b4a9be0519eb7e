"""The only folder that knows transformers and PEFT. Nothing is imported here, so that `import moeroute` stays light."""
