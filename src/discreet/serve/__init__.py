"""The gateway: OpenAI's chat completions from a released model, with prompts de-identified on the way in and restored on the way out."""
