"""What a person is shown of a run: tables, pictures and sentences, made from its plan and its ranks."""
