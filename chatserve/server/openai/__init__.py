"""OpenAI's surface: models, completions, chat completions and responses, each told in OpenAI's own shapes."""
