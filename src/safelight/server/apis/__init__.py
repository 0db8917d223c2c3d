"""The three HTTP interfaces: our own, OpenAI's images and AUTOMATIC1111's."""
