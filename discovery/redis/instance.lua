-- instance returns the instance that a record names, '' if it names none, and nil if
-- what stands there is no record.
local function instance(text)
  local ok, record = pcall(cjson.decode, text)
  if not ok or type(record) ~= 'table' then
    return nil
  end
  local metadata = record['metadata'] or record['Metadata']
  return type(metadata) == 'table' and metadata['instance'] or ''
end
