"""Why a prompt is read again: what two requests differ in, where that stands, and what it costs."""
