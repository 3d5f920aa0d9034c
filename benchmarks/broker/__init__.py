"""What the transport costs beside stock kombu."""
