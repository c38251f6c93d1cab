// Answers questions with @huggingface/transformers about an exported folder: node export_node.mjs request.json
// The request names the folder, the precision and the questions; the answers go to standard output as JSON.
import fs from 'node:fs';
import path from 'node:path';
import { createRequire } from 'node:module';
import { pathToFileURL } from 'node:url';

const request = JSON.parse(fs.readFileSync(process.argv[2], 'utf8'));
const library = createRequire(path.join(request.packages, 'package.json')).resolve('@huggingface/transformers');
const { AutoModelForImageTextToText, AutoProcessor, RawImage, Tensor, env } = await import(pathToFileURL(library));

env.allowRemoteModels = false;
env.localModelPath = path.dirname(request.folder);
const name = path.basename(request.folder);
const processor = await AutoProcessor.from_pretrained(name);
const model = await AutoModelForImageTextToText.from_pretrained(name, { dtype: request.dtype, device: 'cpu' });

async function answer(inputs) {
  const ids = await model.generate({ ...inputs, max_new_tokens: request.max_new_tokens, do_sample: false });
  const written = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
  return processor.batch_decode(written, { skip_special_tokens: true })[0];
}

const answers = [];
for (const { pixels, image, prompt, question } of request.questions) {
  const ours = new Float32Array(new Uint8Array(fs.readFileSync(pixels)).buffer);
  const own = await processor(await RawImage.read(image), prompt);
  const side = own.pixel_values.dims.at(-1);
  const differences = own.pixel_values.data.map((value, index) => Math.abs(value - ours[index]));
  const given = { ...own, pixel_values: new Tensor('float32', ours, [1, 3, side, side]) };
  const turn = { role: 'user', content: `<image>\n${question}` };
  answers.push({
    prompt: processor.apply_chat_template([turn], { add_generation_prompt: true }),
    input_ids: Array.from(own.input_ids.data, Number),
    largest: differences.reduce((a, b) => Math.max(a, b), 0),
    mean: differences.reduce((a, b) => a + b, 0) / differences.length,
    text_of_our_pixels: await answer(given),
    text_of_own_pixels: await answer(own),
  });
}
console.log(JSON.stringify(answers));
