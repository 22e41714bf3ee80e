"""What people bring, as rows: files, folders, archives, tables; media as stored."""
