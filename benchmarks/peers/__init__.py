"""What breaks the locks of celery-once and celery-singleton, done to them and to this library."""
